"""One decoder for every mixer, and its accounting."""

from attamba.models.decoder import Decoder, build_model

__all__ = ["Decoder", "build_model"]
