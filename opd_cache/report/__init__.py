"""Runs in a browser: serve.py answers a page over live runs, write.py puts the same page and its data into one file.

Both show web/, plain JavaScript modules. What they show is asked in SQL over the views of `opd_cache.connect`.
"""
