"""The tiny models and files that the client's tests make."""

from tests.client.conftest import review_files, tiny_language_model, tiny_model

__all__ = ["review_files", "tiny_language_model", "tiny_model"]
