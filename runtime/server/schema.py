"""The body of a chat completion, checked by pydantic: what is not known here is refused, never passed over."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from edgeprune.runtime.server.errors import ApiError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class TextPart(_Strict):
    """Words of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """An image as a data URL. `detail` chooses nothing here: the bundle's plan is the budget, or `tier`."""

    url: str
    detail: Literal["auto"] | None = None


class ImagePart(_Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Text = Annotated[list[TextPart], BeforeValidator(_as_parts)]
Mixed = Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], BeforeValidator(_as_parts)]


class SystemMessage(_Strict):
    """What the model is told before the conversation; "developer" is OpenAI's newer word for it."""

    role: Literal["system", "developer"]
    content: Text
    name: None = None


class UserMessage(_Strict):
    """A question, with images."""

    role: Literal["user"]
    content: Mixed
    name: None = None


class AssistantMessage(_Strict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: Text
    name: None = None
    refusal: None = None
    audio: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    """What a stream carries besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class NamedSchema(_Strict):
    """A JSON schema that the answer is to follow; it always does, whatever `strict` says."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class PlainFormat(_Strict):
    """Text without a form, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(_Strict):
    """JSON of a given form."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class _Neutral(_Strict):
    # What would change the answer and is not done here: only the value that changes nothing is taken.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None


class ChatRequest(_Neutral):
    """A chat completion's request: OpenAI's fields, and after `stop` those of EdgePrune.

    `deadline_ms`: milliseconds from the arrival of the request after which the answer ends. `guided_choice`: the texts of which
    one is to be the answer. `kept`: have the visual tokens that each cut kept in the response.
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
    stop: str | list[str] | None = None
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None

    tier: str | None = None
    deadline_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
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


_KINDS = ("system", "developer", "user", "assistant", "text", "image_url", "json_object", "json_schema")  # that choose a model


def parse(body: bytes) -> ChatRequest:
    """Return the request in a body; raise ApiError (400), naming the parameter, when it is none that can be answered."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> ApiError:
    # The first mistake. Its input is not repeated: it may be a prompt, and messages get into logs.
    first = error.errors(include_input=False, include_url=False)[0]
    param = _place(first["loc"])
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_json", f"The body is not JSON: {first['msg']}.")
    if first["type"] == "extra_forbidden":
        return ApiError(400, "unknown_parameter", f"Unknown parameter: '{param}'.", param=param)
    said = first["msg"].removeprefix("Value error, ")
    if first["loc"] and first["loc"][0] in _Neutral.model_fields:
        message = f"'{param}' is not supported: leave it out, or at the value that changes nothing ({said})."
        return ApiError(400, "unsupported_parameter", message, param=param)
    return ApiError(400, "invalid_value", f"'{param}': {said}." if param else f"{said}.", param=param)


def _place(loc: tuple[int | str, ...]) -> str | None:
    # messages[0].content[1].image_url.url; pydantic puts the chosen kind behind an index, and that of a format behind its name.
    text, before = "", None
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in _KINDS or not (isinstance(before, int) or before == "response_format"):
            text += f".{part}" if text else part
        before = part
    return text or None
