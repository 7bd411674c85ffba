"""The store: modules in files named by what they depend on, shared by processes, safe from what others may write."""

from llsa_gen.store.store import CACHE_DIR_VARIABLE, LOCK_FILE, STAGING_PREFIX, Explanation, Key, Store

__all__ = ["CACHE_DIR_VARIABLE", "LOCK_FILE", "STAGING_PREFIX", "Explanation", "Key", "Store"]
