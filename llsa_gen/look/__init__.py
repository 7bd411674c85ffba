"""Pictures as attention: q, k, v of pixels, what single pixels keep at every level, and the drawing of it.

The demo and `llsa-gen look` share it. Only `drawing` and `picture` need matplotlib, which is an extra.
"""
