"""A tokenizer of bytes: one token a byte, and special tokens as a real one has them."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TURNS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content | trim }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% if add_generation_prompt %}Q: {{ messages[-1].content }}\nA:"
    "{% else %}{% for m in messages %}[{{ m.content }}]{% endfor %}{% endif %}"
)
REFUSING = "{{ raise_exception('only one system message') }}"


def byte_tokenizer(chat_template: str | None = None, bos: bool = False, eos: str | None = "<|end|>"):  # type: ignore[no-untyped-def]
    """One token for every byte; with `bos`, a beginning-of-sequence token is put in front as Llama does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|bos|>", "<|end|>", "<|start|>", "<|turn|>")]
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, bos_token="<|bos|>" if bos else None
    )
    made.chat_template = chat_template
    return made
