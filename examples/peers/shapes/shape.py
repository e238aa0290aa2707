"""What a family tells of its shape: enough to write a checkpoint of it, and forms of it that peers read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Shape(Protocol):
    """One shape of one family.

    `model_type`: transformers' name of the family; `decoder_type` and `decoder_class` of the language model in it, whose weights'
    names begin with `decoder_prefix`. `picture`: what stands for an image in the chat.
    """

    model_type: str
    decoder_type: str
    decoder_class: str
    decoder_prefix: str
    picture: str

    @property
    def tokens(self) -> tuple[str, ...]:
        """Special tokens that its tokenizer has beside the bundled one's."""

    @property
    def side(self) -> int:
        """The side of the square image in pixels."""

    @property
    def blocks(self) -> int:
        """Blocks of the vision encoder."""

    @property
    def entering(self) -> int:
        """Tokens that the image becomes: visual ones, and those of text that the family puts around it and its tiles."""

    def config(self, ids: Mapping[str, int]) -> dict[str, Any]:
        """Return what its config.json says. `ids`: the number of each token."""

    def processor(self) -> dict[str, dict[str, Any]]:
        """Return what its preprocessor_config.json, and others by name, say: such that the image stays as large as it is."""

    def make_older(self, config: dict[str, Any], rope: Mapping[str, Any]) -> None:
        """Change a config.json to what transformers 4 reads. `rope`: what it said of the decoder's rotary positions."""
