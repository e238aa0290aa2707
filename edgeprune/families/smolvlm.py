"""SmolVLM2: Idefics3 in small, with videos as whole images, each after its time in words.

Marafioti et al., arXiv 2504.05299; the modules are those of transformers' models/smolvlm/modeling_smolvlm.py, which repeats
Idefics3's. The text of a video is that of processing_smolvlm.py, which spells out the number of its frames.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from transformers.models.smolvlm.processing_smolvlm import (
    DEFAULT_CHAT_TEMPLATE,
    DEFAULT_MEDIA_OUTTRO,
    DEFAULT_VIDEO_INTRO,
    FRAME_TIMESTAMP_MESSAGE,
)

from edgeprune.bundle import ImageText
from edgeprune.errors import UsageError
from edgeprune.families.idefics3 import Idefics3, whole_text
from edgeprune.plan import Geometry

_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


class SmolVLM(Idefics3):
    """Where the parts of a SmolVLMForConditionalGeneration are."""

    name = "smolvlm"
    videos = True
    chat_template = DEFAULT_CHAT_TEMPLATE

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return the tiles and the whole image, or the frames of a video with their times."""
        image = super().image_text(geometry)
        if geometry.frames == 1:
            return image
        length = timedelta(seconds=int(geometry.frames / geometry.fps))
        text = DEFAULT_VIDEO_INTRO.format(frame_count=_words(geometry.frames), video_duration=str(length))
        for frame in range(geometry.frames):
            minutes, seconds = divmod(int(frame / geometry.fps), 60)
            text += FRAME_TIMESTAMP_MESSAGE.format(timestamp=f"{minutes:02d}:{seconds:02d}") + whole_text()
        return replace(image, kind="video", placeholder="<video>", text=text + DEFAULT_MEDIA_OUTTRO)


def _words(number: int) -> str:
    # A count of frames in English, as num2words spells it.
    if number >= 1000:
        raise UsageError(f"A SmolVLM video of {number} frames is too long.", hint="Take fewer frames of it.")
    hundreds, rest = divmod(number, 100)
    tens, ones = divmod(rest, 10)
    small = (*_ONES, *_TEENS)[rest] if rest < 20 else _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")
    if not hundreds:
        return small
    return f"{_ONES[hundreds]} hundred" + (f" and {small}" if rest else "")
