"""The results page: its tables and plots, made from the committed rows."""
