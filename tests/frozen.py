"""Exempt what is loaded from garbage collection; imported last by the process that commands are forked from.

A full collection in a forked process would visit, and so copy, all objects of torch and of the other libraries.
"""

import gc

gc.collect()
gc.freeze()
