"""The shape of ``model_zoo.yaml`` (schema ``vlmeff.zoo/1``).

Models say what a checkpoint is, presets how it is run, entries join the two with evidence. Here stands what one record
shows by itself; ``vlmeff.zoo_yaml`` reads it, rules across records stand in ``vlmeff.zoo_rules``.
"""

from __future__ import annotations

import difflib
import math
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple, get_args

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

Status = Literal["verified", "reported", "experimental", "broken", "fixture"]
STATUSES: tuple[str, ...] = get_args(Status)


class Problem(NamedTuple):
    """One thing wrong with a zoo file; its text is one line.

    E-ZOO-01 schema or content, E-ZOO-02 override without permission, E-ZOO-03 verified without evidence.
    """

    code: Literal["E-ZOO-01", "E-ZOO-02", "E-ZOO-03"]
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.code} {self.where}: {' '.join(self.message.split())}"


def _licence(value: str) -> str:
    try:
        return canonicalize_license_expression(value)
    except InvalidLicenseExpression:
        raise ValueError(f"{value!r} is neither an SPDX id nor LicenseRef-...; use null when it is not known") from None


def _specifier(value: str) -> str:
    try:
        SpecifierSet(value)
    except InvalidSpecifier:
        raise ValueError(f'{value!r} is not a version range such as ">=5.18,<6"') from None
    return value


def _budget(value: object) -> object:
    if (type(value) is int and value >= 1) or (isinstance(value, float) and 0 < value <= 1):
        return value
    raise ValueError(f"{value!r} is not a budget; use an int >= 1 (tokens per image) or a share in (0, 1]")


def _relative(value: str) -> str:
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{value!r} must be a path below the zoo file's folder")
    return value


def _yes_no(value: object) -> object:
    # YAML 1.1 reads an unquoted yes or no as a boolean.
    return ("no", "yes")[value] if isinstance(value, bool) else value


Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.\-]*$")]
EntryName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.\-]*(/[a-z0-9.\-]+)?$")]
Text = Annotated[str, StringConstraints(min_length=1)]
Url = Annotated[str, StringConstraints(pattern=r"^https://\S+$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Licence = Annotated[str, AfterValidator(_licence)]
Budget = Annotated[int | float, BeforeValidator(_budget)]
Share = Annotated[float, Field(gt=0, le=1)]
Lines = Annotated[tuple[Text, ...], Field(strict=False)]  # strict mode would refuse YAML's lists
Pair = Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]
Params = dict[str, bool | int | float | str | list[Any] | dict[str, Any] | None]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, value: object) -> object:
        """pydantic's own message for an unknown key does not list the known ones."""
        known = sorted(field.alias or name for name, field in cls.model_fields.items())
        unknown = [key for key in value if key not in known] if isinstance(value, dict) else []
        problems = []
        for key in unknown:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            problems.append(f"unknown key {key!r}, " + (f"did you mean {near[0]!r}?" if near else f"known: {known}"))
        if problems:
            raise ValueError("; ".join(problems))
        return value


class FixedTokens(_Record):
    """A tower with one input size: ``grid`` (height, width) tokens for every picture of ``image_size`` pixels."""

    kind: Literal["fixed"]
    per_image: PositiveInt
    grid: Pair
    patch: PositiveInt
    image_size: PositiveInt

    @model_validator(mode="after")
    def _consistent(self) -> FixedTokens:
        if self.grid != (self.image_size // self.patch,) * 2 or self.per_image != math.prod(self.grid):
            raise ValueError(f"grid or per_image is not what {self.image_size} px in patches of {self.patch} px give")
        return self

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Token grid of a picture of ``height`` x ``width`` pixels: the size does not matter here."""
        return self.grid


class DynamicTokens(_Record):
    """A tower that follows the picture's size (Qwen-VL): one token per square of ``pixels_per_token`` pixels.

    ``min`` and ``max`` bound the tokens of one picture; ``temporal_patch`` frames of a video share their tokens.
    """

    kind: Literal["dynamic"]
    pixels_per_token: PositiveInt
    min: PositiveInt
    max: PositiveInt
    temporal_patch: PositiveInt = 1

    @model_validator(mode="after")
    def _consistent(self) -> DynamicTokens:
        if math.isqrt(self.pixels_per_token) ** 2 != self.pixels_per_token:
            raise ValueError(f"pixels_per_token {self.pixels_per_token} is not the area of a square")
        if self.min > self.max:
            raise ValueError(f"min {self.min} exceeds max {self.max}")
        return self

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Token grid (rows, columns) of a picture of ``height`` x ``width`` pixels.

        Same steps as ``smart_resize`` of transformers' Qwen2-VL image processor, in tokens instead of pixels.
        """
        side = math.isqrt(self.pixels_per_token)
        rows, columns = round(height / side), round(width / side)
        if rows * columns > self.max:
            beta = math.sqrt(height * width / (self.max * self.pixels_per_token))
            rows = max(1, math.floor(height / beta / side))
            columns = max(1, math.floor(width / beta / side))
        elif rows * columns < self.min:
            beta = math.sqrt(self.min * self.pixels_per_token / (height * width))
            rows, columns = math.ceil(height * beta / side), math.ceil(width * beta / side)
        return rows, columns


class Vision(_Record):
    """The vision tower. ``select_layer`` is the ``vision_feature_layer``."""

    tower: Text
    layers: PositiveInt
    hidden: PositiveInt | None = None
    select_layer: int
    has_cls: bool


class Decoder(_Record):
    layers: PositiveInt
    hidden: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt


class Transformer(_Record):
    """The diffusion transformer of a pipeline: its diffusers class, blocks and width."""

    class_name: Text
    layers: PositiveInt
    hidden: PositiveInt


class Generator(_Record):
    """The trunk of a generator of continuous tokens (MAR)."""

    encoder_dim: PositiveInt
    encoder_depth: PositiveInt
    img_size: PositiveInt
    class_num: PositiveInt


class ModelRecord(_Record):
    """What a checkpoint is: source, licence, geometry.

    ``family`` is the ``model_type`` of the transformers configuration. ``method_params`` holds, per method, parameters
    that depend on the model (HiPrune's object layer); they win over a preset's and lose to an entry's.
    ``trained_with`` names methods that the checkpoint was trained with ("fourier"). ``positions`` is how surviving
    tokens are numbered where measurements favour another way than the family's.
    """

    name: SkipJsonSchema[str] = ""  # the key in ``models``, written by ``_named``
    override: bool = False
    hub_id: Annotated[str, StringConstraints(pattern=r"^[\w.\-]+/[\w.\-]+$")] | None = None
    embedded: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")] | None = None
    revision: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{40}|sha256:[0-9a-f]{64})$")] | None
    license: Licence | None
    license_url: Url | None = None
    gated: bool = False
    commercial_use: Annotated[Literal["yes", "no", "conditional"], BeforeValidator(_yes_no)]
    family: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
    task: Text
    transformers: Annotated[str, AfterValidator(_specifier)] | None = None
    visual_tokens: Annotated[FixedTokens | DynamicTokens, Field(discriminator="kind")] | None = None
    vision: Vision | None = None
    llm: Decoder | None = None
    transformer: Transformer | None = None
    generator: Generator | None = None
    method_params: dict[str, Params] = {}
    trained_with: Lines = ()
    positions: Literal["repack", "keep"] | None = None
    notes: Lines = ()

    @model_validator(mode="after")
    def _consistent(self) -> ModelRecord:
        if (self.hub_id is None) == (self.embedded is None):
            raise ValueError("give either hub_id or embedded")
        if self.revision is not None and self.revision.startswith("sha256:") != (self.embedded is not None):
            raise ValueError("revision is the commit (40 hex digits) of a hub model, sha256:<hex> of an embedded one")
        if self.license is not None and self.license_url is None:
            raise ValueError("license needs license_url")
        if self.task == "image-text-to-text" and None in (self.visual_tokens, self.vision, self.llm):
            raise ValueError("task image-text-to-text needs visual_tokens, vision and llm")
        if self.task == "text-to-video" and self.transformer is None:
            raise ValueError("task text-to-video needs transformer")
        if self.task == "class-to-image" and self.generator is None:
            raise ValueError("task class-to-image needs generator")
        return self

    @property
    def is_pinned(self) -> bool:
        """Whether ``revision`` names one state of the weights (all zeros is a placeholder)."""
        return self.revision is not None and set(self.revision.removeprefix("sha256:")) != {"0"}


class Artefact(_Record):
    """A file that a method needs besides the model, such as a PrefixKV recipe."""

    source: Text
    sha256: Sha256 | None = None
    license: Licence | None = None
    license_url: Url | None = None


class StepRecord(_Record):
    """One technique of a preset: ``keep`` for visual tokens, ``keep_ratio`` for KV retention, neither for others."""

    method: Text
    keep: Budget | None = None
    keep_ratio: Share | None = None
    params: Params = {}
    artefact: Artefact | None = None

    @model_validator(mode="after")
    def _consistent(self) -> StepRecord:
        if self.keep is not None and self.keep_ratio is not None:
            raise ValueError("give keep or keep_ratio, not both")
        return self


class Preset(_Record):
    """How a model is run: ``steps`` for vision-language models, ``video`` for video pipelines, ``image`` for generators
    of continuous tokens."""

    name: SkipJsonSchema[str] = ""  # the key in ``presets``, written by ``_named``
    override: bool = False
    summary: Text
    steps: Annotated[tuple[StepRecord, ...], Field(strict=False)] = ()
    video: Annotated[tuple[StepRecord, ...], Field(strict=False)] = ()
    video_summary: Text | None = None
    image: Annotated[tuple[StepRecord, ...], Field(strict=False)] = ()
    image_summary: Text | None = None
    notes: Lines = ()

    @model_validator(mode="after")
    def _consistent(self) -> Preset:
        if bool(self.video) != (self.video_summary is not None) or bool(self.image) != (self.image_summary is not None):
            raise ValueError("video and video_summary go together, image and image_summary too")
        if not self.steps and not self.video and not self.image:
            raise ValueError("give steps (vision-language models), video (video pipelines) or image (generators)")
        for steps in (self.steps, self.video, self.image):
            methods = [step.method for step in steps]
            if len(set(methods)) != len(methods):
                raise ValueError("a method occurs in more than one step")
        return self


class StepOverride(_Record):
    """What an entry changes in the step of one method."""

    keep: Budget | None = None
    keep_ratio: Share | None = None
    params: Params = {}


class KeptTokens(_Record):
    """Visual tokens of one picture before and after reduction."""

    tokens_in: PositiveInt = Field(alias="in")
    kept: PositiveInt


class Example(KeptTokens):
    """``image``: (height, width) in pixels."""

    image: Pair


class TokenFormula(_Record):
    """Tokens of a model of dynamic resolution: a formula for the reader and examples that are checked."""

    formula: Text
    examples: Annotated[tuple[Example, ...], Field(strict=False, min_length=3)]

    @model_validator(mode="after")
    def _consistent(self) -> TokenFormula:
        if len({example.image for example in self.examples}) != len(self.examples):
            raise ValueError("the examples repeat an image size")
        return self


def _token_kind(value: object) -> str:
    is_formula = isinstance(value, TokenFormula) or (isinstance(value, dict) and {"formula", "examples"} & value.keys())
    return "dynamic" if is_formula else "fixed"


EntryTokens = Annotated[
    Annotated[KeptTokens, Tag("fixed")] | Annotated[TokenFormula, Tag("dynamic")], Discriminator(_token_kind)
]


class Expected(_Record):
    """A score that we measured: the unwrapped model's (``baseline``) and the preset's (``value``) over n documents.

    ``benchmark`` and ``metric`` are names of ``vlmeff eval``, ``limit`` what it was given (None: everything): what
    ``vlmeff eval verify`` runs again. ``metric`` is a key of the benchmark's figures.
    """

    benchmark: Text
    metric: Text
    n: PositiveInt
    limit: PositiveInt | None = None
    baseline: float
    value: float
    tolerance: Annotated[float, Field(ge=0)]
    unit: Literal["points", "share", "score"] = "points"


class Cost(_Record):
    """Deterministic cost relative to the unwrapped model."""

    kv_ratio: PositiveFloat | None = None
    prefill_gflops_ratio: PositiveFloat | None = None


class Latency(_Record):
    """Measured on one device; informative, never asserted on another."""

    device: Text
    dtype: Text
    ttft_speedup: PositiveFloat
    n: PositiveInt


class Evidence(_Record):
    """The result file behind ``expected``; ``results`` is relative to the zoo file's folder."""

    results: Annotated[str, AfterValidator(_relative)]
    sha256: Sha256
    vlmeff: Text
    transformers: Text
    torch: Text
    date: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\d$")]
    by: Text


class PaperFigures(_Record):
    """Scores as printed in a paper, by benchmark, in its units."""

    budget: Text
    unpruned: dict[str, float]
    pruned: dict[str, float]
    relative_mean_percent: float | None = None

    def pairs(self) -> dict[str, tuple[float, float]]:  # benchmark: (unpruned, pruned)
        return {name: (self.unpruned[name], value) for name, value in self.pruned.items() if name in self.unpruned}


class Paper(_Record):
    """What a paper says, apart from what we measured."""

    title: Text
    arxiv: Annotated[str, StringConstraints(pattern=r"^\d{4}\.\d{4,5}$")] | None = None
    table: Text | None = None
    reported: PaperFigures


class Entry(_Record):
    """A preset on a model, with what is known about the pair.

    ``overrides`` is keyed by method. ``fixture`` entries serve tests and the demo; they recommend nothing.
    ``min_visual_tokens``: with fewer visual tokens per row the token step is not expected to pay off and is skipped.
    """

    name: EntryName
    override: bool = False
    model: Name
    preset: Name
    overrides: dict[str, StepOverride] = {}
    status: Status
    min_visual_tokens: Annotated[int, Field(ge=0)] = 0
    tokens: EntryTokens | None = None
    expected: Annotated[tuple[Expected, ...], Field(strict=False)] = ()
    cost: Cost | None = None
    latency: Latency | None = None
    evidence: Evidence | None = None
    paper: Paper | None = None
    notes: Lines = ()
    supersedes: EntryName | None = None


def _named(value: object) -> object:
    """Write each key of a mapping of records into its record: a record should know its name."""
    if not isinstance(value, dict):
        return value
    for key, record in value.items():
        if isinstance(record, dict) and "name" in record:
            raise ValueError(f"{key}: unknown key 'name'; the name is the key {key!r} itself")
    return {key: {**record, "name": str(key)} if isinstance(record, dict) else record for key, record in value.items()}


class ZooFile(_Record):
    """One zoo file. Each part may be absent in a file that extends the shipped one."""

    schema_: Literal["vlmeff.zoo/1"] = Field(alias="schema")
    models: Annotated[dict[Name, ModelRecord], BeforeValidator(_named)] = {}
    presets: Annotated[dict[Name, Preset], BeforeValidator(_named)] = {}
    entries: Annotated[tuple[Entry, ...], Field(strict=False)] = ()
