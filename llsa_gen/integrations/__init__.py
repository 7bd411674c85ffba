"""Adapters that put compiled attention into models of other libraries; nothing is imported until it is used."""
