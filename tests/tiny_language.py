"""What tiny pipelines with language models share: sizes, and a real tokenizer."""

WIDTH = 16  # of texts
ROPE = (4, 6, 6)
EYES = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think></think>\n{% endif %}{% endif %}"
)


def language(**more):
    """The sizes of a language model."""
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        **more,
    }


def qwen_tokenizer():
    """A real Qwen tokenizer that spells words out in bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    symbols = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(symbols)}, merges=[], model_max_length=2048, chat_template=CHAT
    )
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>", *EYES], special_tokens=True)
    return tokenizer
