"""The attentions that a layer can compute, one file each, found by name. Nothing here knows of Transformers' models or caches."""

from __future__ import annotations

from .form import Call, Form, Numbers, Sizes, State, Tokens
from .parameters import LinAttnParams
from .polynomial import Polynomial
from .window import Window

FORMS: dict[str, type[Form]] = {form.name: form for form in (Polynomial, Window)}

__all__ = ["FORMS", "Call", "Form", "LinAttnParams", "Numbers", "Polynomial", "Sizes", "State", "Tokens", "Window"]
