"""Readers of files, each with good contents and where JSON lies in them, for the fuzzer."""
