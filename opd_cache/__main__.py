"""`python -m opd_cache` is `opd-cache`."""

from opd_cache.cli import main

main()
