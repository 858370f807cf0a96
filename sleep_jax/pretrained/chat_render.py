"""Renders a chat template: a program of its own, which can read nothing, call little and use little.

It takes {"template", "context", "chats": [{"messages", "add_generation_prompt"}, ...]} as JSON on stdin and
prints {"texts": [...]} or {"error": "..."}. A template is a program that came with a checkpoint. It runs in
Jinja's immutable sandbox and, since that bounds neither time nor memory, in a process that the system bounds.
"""

import json
import resource
import sys
from typing import Any

SECONDS, BYTES = 10, 1 << 30


def render(template: str, context: dict[str, Any], chats: list[dict[str, Any]]) -> list[str]:
  """The texts of chats.

  Raises:
    Exception: whatever Jinja and the template raise.
  """
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what a model said; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
      next(parser.stream)
      return parser.parse_statements(("name:endgeneration",), drop_needle=True)

  def refuse(message: str) -> None:
    raise jinja2.TemplateError(str(message))

  def to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
  )
  environment.filters["tojson"] = to_json
  environment.globals["raise_exception"] = refuse
  compiled = environment.from_string(template)
  return [compiled.render(**context, **chat) for chat in chats]


def main() -> None:
  resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
  resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
  try:
    answer: dict[str, Any] = {"texts": render(**json.load(sys.stdin))}
  except ModuleNotFoundError:
    answer = {"error": "needs the package jinja2: pip install jinja2"}
  except BaseException as e:  # all of it is the template's fault
    answer = {"error": f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"}
  json.dump(answer, sys.stdout)


if __name__ == "__main__":
  main()
