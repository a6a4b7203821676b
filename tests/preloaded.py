"""What the server of `tests.children` imports once, instead of every child."""
# ruff: noqa: F401

import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.trainer

import stillhouse.commands
import stillhouse.runs.execute
import tests.small_runs
import tests.workshop
