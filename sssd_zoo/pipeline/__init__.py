"""A file per command of `sssd`, named as it; and the stages of `fit`, `compare` and `finetune`."""
