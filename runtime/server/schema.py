"""The request body of a chat completion, validated by pydantic. Unknown fields are rejected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from edgeprune.errors import did_you_mean
from edgeprune.runtime.server.errors import ApiError
from edgeprune.runtime.text.grammar import MAX_CHOICES

MAX_STOPS, MAX_STOP_CHARS = 16, 256
# Discriminator values, which pydantic inserts into error locations.
_KINDS = ("system", "developer", "user", "assistant", "text", "image_url", "json_object", "json_schema")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class _Part(_Strict):
    cache_control: dict[str, Any] | None = None  # a hint for other servers' caches, without effect


class TextPart(_Part):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """An image as a data URL. `detail` has no effect, because the bundle's plan or `tier` sets the keep budget."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Part):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_answer(content: Any) -> Any:
    return [] if content is None else _as_parts(content)


Text = Annotated[list[TextPart], BeforeValidator(_as_parts)]
Mixed = Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], BeforeValidator(_as_parts)]


class SystemMessage(_Strict):
    """The system prompt. "developer" is OpenAI's newer name for this role."""

    role: Literal["system", "developer"]
    content: Text
    name: str | None = None


class UserMessage(_Strict):
    """A question, optionally with images."""

    role: Literal["user"]
    content: Mixed
    name: str | None = None


class AssistantMessage(_Strict):
    """An earlier answer. `content` None: an empty one."""

    role: Literal["assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_as_answer)] = []
    name: str | None = None
    refusal: None = None
    audio: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    """Options of a streamed response."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class NamedSchema(_Strict):
    """A JSON schema for the answer. It is always enforced, regardless of `strict`."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class PlainFormat(_Strict):
    """Free text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(_Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class _Neutral(_Strict):
    # Unsupported fields of OpenAI and vLLM. Only values without effect are accepted.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none"] | None = None
    min_p: Annotated[float, Field(ge=0, le=0)] | None = None  # of vLLM
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class ChatRequest(_Neutral):
    """The request of a chat completion: OpenAI's fields, then those of EdgePrune from `tier` on.

    `deadline_ms`: milliseconds from the arrival of the request to the end of the answer. `guided_choice`: the answer is one of
    these texts. `kept`: include the visual tokens that each cut kept in the response.
    """

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # of vLLM, as the next two: -1 and 0 take all tokens
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    skip_special_tokens: bool | None = None
    stop: Annotated[list[Stop], Field(max_length=MAX_STOPS), BeforeValidator(_as_list)] | None = None
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None

    tier: str | None = None
    deadline_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    prune: bool = True
    kept: bool = False

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one limit; they must not differ")
        if self.guided_choice is not None and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("guided_choice and response_format ask for two forms at once")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        return self


def parse(body: bytes) -> ChatRequest:
    """Parse and validate a body. Raises ApiError (400) with the invalid parameter."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> ApiError:
    # Report the first error without its input: the input may be a prompt, and messages are logged.
    first = error.errors(include_input=False, include_url=False)[0]
    param = _place(first["loc"])
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_json", f"The body is not JSON: {first['msg']}.")
    if first["type"] == "extra_forbidden":
        proposed = did_you_mean(str(first["loc"][-1]), ChatRequest.model_fields).strip() if len(first["loc"]) == 1 else ""
        return ApiError(400, "unknown_parameter", " ".join(filter(None, (f"Unknown parameter: '{param}'.", proposed))), param=param)
    reason = _reason(first["type"], first["msg"], first.get("ctx", {}))
    if first["loc"] and first["loc"][0] in _Neutral.model_fields:
        message = f"'{param}' is not supported here. Leave it out{_without_effect(first['type'], first.get('ctx', {}))}."
        return ApiError(400, "unsupported_parameter", message, param=param)
    return ApiError(400, "invalid_value", f"'{param}': {reason}." if param else f"{reason}.", param=param)


def _reason(kind: str, message: str, context: Mapping[str, Any]) -> str:
    # pydantic's own words, except where they speak of its validation.
    if kind in ("too_long", "too_short"):
        most, number = kind == "too_long", context["max_length" if kind == "too_long" else "min_length"]
        return f"Give at {'most' if most else 'least'} {number}, not {context['actual_length']}"
    return message.removeprefix("Value error, ")


def _without_effect(kind: str, context: Mapping[str, Any]) -> str:
    # What an unsupported field may be without changing anything.
    if kind == "literal_error":
        return f", or give {str(context['expected']).lower()}"
    return ", or give it empty" if kind == "too_long" else ""


def _place(loc: tuple[int | str, ...]) -> str | None:
    # Such as messages[0].content[1].image_url.url. pydantic inserts the chosen kind after an index and after "response_format".
    text, before = "", None
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in _KINDS or not (isinstance(before, int) or before == "response_format"):
            text += f".{part}" if text else part
        before = part
    return text or None
