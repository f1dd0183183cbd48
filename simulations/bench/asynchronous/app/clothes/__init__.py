"""A small classifier of clothes on machines of different speed."""
