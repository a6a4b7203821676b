"""The loss on a GPU: objectives inside of one Triton kernel. Its modules need triton; nothing else imports
them."""
