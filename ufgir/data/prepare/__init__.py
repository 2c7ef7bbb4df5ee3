"""Convert raw downloads of Ultra-FGVC to checked parquet files: raw layouts, checks and the writer."""
