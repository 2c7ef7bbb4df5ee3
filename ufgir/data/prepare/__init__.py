"""Turn a raw download of Ultra-FGVC into checked parquet files: the layouts it comes in, its checks, and the writer."""
