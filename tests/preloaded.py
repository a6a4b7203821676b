"""What the server of `tests.children` imports once, instead of every child."""
# ruff: noqa: F401

import gc

import matplotlib.pyplot
import rouge_score.rouge_scorer
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.trainer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import stillhouse.commands
import stillhouse.engines.decode
import stillhouse.runs.api
import stillhouse.runs.chains.execute
import stillhouse.runs.execute
import tests.small_runs
import tests.workshop

get_checkpoint_conversion_mapping("gpt2")  # made for all models when it is first asked
gc.collect()
gc.freeze()  # a child's collections would read, and so copy, all of it
