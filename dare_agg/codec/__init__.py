"""The bytes of an update: masks, value formats, payloads, files."""
