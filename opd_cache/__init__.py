"""On-policy distillation in three restartable stages joined by Parquet shards."""

__version__ = "0.1.0"
