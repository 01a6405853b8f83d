"""The parts of config.py's sections: a base class, descriptions, common checks, and settings with a value by key."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    create_model,
)

CheckKey = Callable[[str], None]  # raises ValueError for a key that a mapping of values must not have


class Section(BaseModel):
    """A section of params.yaml. Every setting must be given, and no other key is allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def about(description: str, unit: str = "") -> Any:
    """The description of a setting and the unit of its value, for docs/settings.md. It is not a default."""
    return Field(description=description, json_schema_extra={"unit": unit})


def check_name(name: str, known: Iterable[str], what: str) -> str:
    """Return `name` if it is among the known names. Otherwise raise ValueError with the closest of them, or with all.

    `what` is the kind of thing that they name, such as "method".
    """
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise ValueError(f"no such {what}; {hint}")
    return name


def check_training_key(key: str, objectives: Iterable[str]) -> None:
    """Raise ValueError unless `key` is `default`, `joint`, `scratch`, an objective, or noise as in file names:
    `sigma_0.5`.
    """
    names = ["default", "joint", "scratch", *objectives]
    if key in names:
        return
    try:
        sigma = float(key.removeprefix("sigma_"))
    except ValueError:
        close = difflib.get_close_matches(key, names, n=1)
        known = f"allowed here: {', '.join(names)}, and noise such as sigma_0.5"
        raise ValueError(f"unknown key; {f'did you mean {close[0]}?' if close else known}") from None
    if key != f"sigma_{sigma}":
        raise ValueError(f"unknown key; did you mean sigma_{sigma}?")


def check_width(embed_dim: int, num_heads: int, prefix: str = "") -> None:
    """Raise ValueError unless a transformer may have this width. `prefix` is prepended to the settings' names.

    Its attention heads divide the width equally. Sines and cosines of its embeddings fill one half each.
    """
    if embed_dim % num_heads or embed_dim % 2:
        raise ValueError(f"{prefix}embed_dim {embed_dim} must be even and a multiple of {prefix}num_heads {num_heads}")


def count_halvings(image_size: int, patch_size: int) -> int:
    """How often a side of `image_size` pixels is halved, rounding up, until there is one position for each patch.

    0 if that never gives this number of positions.
    """
    side, halvings = image_size, 0
    while side > image_size // patch_size:
        side, halvings = (side + 1) // 2, halvings + 1
    return halvings if side == image_size // patch_size else 0


def check_stem(stem: str, image_size: int, patch_size: int, embed_dim: int) -> None:
    """Raise ValueError unless a stem of this kind fits an image and the width of the tokens."""
    if stem != "convolutions":
        return
    halvings = count_halvings(image_size, patch_size)
    if not halvings:
        raise ValueError(
            f"stem convolutions does not take {image_size} pixels to {image_size // patch_size} tokens a side by "
            f"halving; choose patch_size {_sizes_by_halving(image_size)}, or stem patches"
        )
    if embed_dim % 2**halvings:
        raise ValueError(f"embed_dim {embed_dim} must be a multiple of {2**halvings} with stem convolutions")


def check_cnn(image_size: int, patch_size: int, embed_dim: int) -> None:
    """Raise ValueError unless a `NoiseConditionedCNN` may have these sizes."""
    halvings = count_halvings(image_size, patch_size) if image_size % patch_size == 0 else 0
    if not halvings:
        fits = _sizes_by_halving(image_size)
        raise ValueError(f"patch_size {patch_size} must be {fits} for a cnn, which halves {image_size} pixels")
    if embed_dim % 2 ** (halvings + 1):
        raise ValueError(f"embed_dim {embed_dim} must be a multiple of {2 ** (halvings + 1)} for a cnn")


def _sizes_by_halving(image_size: int) -> str:
    """The sizes of patches for which `count_halvings` is not 0, in words."""
    return word_list(n for n in range(2, image_size) if not image_size % n and count_halvings(image_size, n))


def word_list(values: Iterable[object]) -> str:
    """The values, as in: 2, 4 or 7."""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


def value_by_key(kind: Any, check_key: CheckKey) -> Any:
    """The type of a setting that is one value of type `kind`, or a mapping of such values by key."""
    validate = TypeAdapter(kind, config=Section.model_config).validate_python
    return Annotated[Any, PlainValidator(partial(_validate_each, validate, check_key))]


def _validate_each(validate: Callable[[object], object], check_key: CheckKey, setting: object) -> object:
    if not isinstance(setting, Mapping):
        return validate(setting)
    errors = []
    for key, value in setting.items():
        try:
            check_key(str(key))
            validate(value)
        except ValidationError as error:
            errors += [{**each, "loc": (str(key), *each["loc"])} for each in error.errors(include_url=False)]
        except ValueError as error:
            errors.append({"type": "value_error", "loc": (str(key),), "input": setting, "ctx": {"error": error}})
    if errors:
        raise ValidationError.from_exception_data("setting", errors)
    return {key: validate(setting[key]) for key in sorted(setting)}


def word_or(word: str, kind: Any, what: str) -> Any:
    """The type of a setting that is `word` or of type `kind`. `what` describes `kind` in the error for other text."""
    validate = TypeAdapter(kind, config=Section.model_config).validate_python

    def check(value: object) -> object:
        if isinstance(value, str) and value != word:
            raise ValueError(f"must be {word}, or {what}")
        return value if value == word else validate(value)  # the error of a union would be about both types

    return Annotated[Literal[word] | kind, BeforeValidator(check)]


def section_by_key(section: type[Section], check_key: CheckKey) -> type[Section]:
    """`section` in which every setting may be a mapping by key, including the settings of nested sections."""
    kinds = get_type_hints(section, include_extras=True)
    fields = {}
    for name, field in section.model_fields.items():
        kind = kinds[name]
        if isinstance(kind, type) and issubclass(kind, Section):
            fields[name] = (section_by_key(kind, check_key), ...)
        else:
            unit = (field.json_schema_extra or {}).get("unit", "")
            fields[name] = (value_by_key(kind, check_key), about(field.description, unit))
    base = section if section.model_config["extra"] == "allow" else Section
    return create_model(section.__name__, __base__=base, __doc__=section.__doc__, **fields)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first complaint of a pydantic error as one line: the key, its value, and what is allowed."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    key, value, message = ".".join(path), first["input"], first["msg"]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        allowed = _keys_at(model, path[:-1])
        close = difflib.get_close_matches(path[-1], allowed, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed here: {', '.join(allowed)}"
        return f"{key}: unknown key; {hint}{more}"
    if first["type"] == "missing":
        return f"{key}: missing; every setting must be given{more}"
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    if isinstance(value, Mapping | BaseModel):  # a rule over a whole section: the message names key and value
        return f"{key + ': ' if key else ''}{message}{more}"
    shown = repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    if first["type"] == "list_type" and isinstance(value, str | float | int):
        message += f", such as [{value}]"
    return f"{key} = {shown}: {message}{more}"


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:  # a key, or the index of a list's entry
        model = get_args(model)[0] if part.isdigit() else model.model_fields[part].annotation
    return list(model.model_fields)
