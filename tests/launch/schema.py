"""Checks a Kubernetes object against the schema of its custom resource, closed: no field that it lacks."""

import gzip
import json
import pathlib
from collections.abc import Iterator
from typing import Any

# The OpenAPI schema of JobSet v1alpha2 in its CRD, from kubernetes-sigs/jobset at 08dfbdf (Apache-2.0).
JOBSET = pathlib.Path(__file__).parents[1] / "data" / "jobset_schema.json.gz"
KINDS = {
  "object": dict,
  "array": list,
  "string": str,
  "boolean": bool,
  "integer": int,
  "number": (int, float),
}


def load(path: pathlib.Path = JOBSET) -> dict[str, Any]:
  with gzip.open(path, "rt") as file:
    return json.load(file)


def errors(value: Any, schema: dict[str, Any], where: str = "") -> Iterator[str]:
  """Yields what does not fit, as `path: what`."""
  if schema.get("x-kubernetes-int-or-string"):
    if isinstance(value, bool) or not isinstance(value, (int, str)):
      yield f"{where}: must be a number or text, got {value!r}"
    return
  kind = KINDS[schema["type"]] if "type" in schema else object
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool and kind is not object):
    yield f"{where}: must be of type {schema['type']}, got {value!r}"
    return
  if "enum" in schema and value not in schema["enum"]:
    yield f"{where}: must be one of {schema['enum']}, got {value!r}"
  if isinstance(value, list):
    for i, item in enumerate(value):
      yield from errors(item, schema.get("items", {}), f"{where}[{i}]")
  if isinstance(value, dict):
    known, others = schema.get("properties"), schema.get("additionalProperties")
    yield from (f"{where}: lacks {name}" for name in schema.get("required", ()) if name not in value)
    for name, item in value.items():
      if known is not None and name in known:
        yield from errors(item, known[name], f"{where}.{name}")
      elif isinstance(others, dict):
        yield from errors(item, others, f"{where}.{name}")
      elif known is not None:
        yield f"{where}: there is no field {name}"
