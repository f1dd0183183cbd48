"""Tables in files: CSV and its kin, JSON, Parquet; named columns of cells."""
