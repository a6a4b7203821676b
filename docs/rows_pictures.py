"""Pictures of `stillhouse show rows` for docs/rows.md: python docs/rows_pictures.py"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import AutoTokenizer

from stillhouse.files import locate

IMAGES = Path(__file__).resolve().parent / "images"
CHATML = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
FILES = {
    "dolly": (
        "rows.jsonl",
        {"instruction": "When was it built?", "context": "The mill was built in 1820.", "response": "1820",
         "category": "closed_qa"},
        ("data.template=alpaca",),
    ),
    "tools": (
        "rows.jsonl",
        {"tools": [TOOL], "messages": [
            {"role": "user", "content": [{"type": "text", "text": "How warm is it in Oslo?"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "5 C"},
            {"role": "assistant", "content": "5 degrees."},
        ]},
        ("data.train_on=all",),
    ),
    "sharegpt": (
        "rows.jsonl",
        {"conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "What does <|im_end|> mean?"},
            {"from": "gpt", "value": "The end of a turn."},
        ]},
        (),
    ),
    "csv": (
        "rows.csv",
        'prompt,response\nhi,"hello, you"\nbye,\n',
        ("data.template=plain", "data.no_response=drop"),
    ),
}  # fmt: skip
RUN = """\
recipe: sft
student: {tokenizer: tokenizer, from_config: {model_type: llama}}
data: {train: ROWS}
"""


def main() -> None:
    """Make every picture."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer = AutoTokenizer.from_pretrained(locate("package:stillhouse/demo/teacher"))
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(folder / "tokenizer")
        for name, (file, content, options) in FILES.items():
            text = content if isinstance(content, str) else json.dumps(content) + "\n"
            (folder / file).write_text(text, encoding="utf-8")
            (folder / "run.yaml").write_text(RUN.replace("ROWS", file), encoding="utf-8")
            picture(folder, name, ["show", "rows", "run.yaml", *options])


def picture(folder: Path, name: str, command: list[str]) -> None:
    """What a command prints, in colours, as an SVG file."""
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse", *command],
        cwd=folder, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text("$ stillhouse " + " ".join(command), "bold"))
    console.print(Text.from_ansi(done.stdout.rstrip()))
    target = IMAGES / f"rows-{name}.svg"
    target.write_text(console.export_svg(title="", unique_id=f"rows-{name}"), encoding="utf-8")


if __name__ == "__main__":
    main()
