"""A stand-in for Colab's package: what huggingface_hub and our notebooks touch of it.

The variable STANDIN_COLAB says how it answers for the secret HF_TOKEN: a token to give,
or `missing`, `refused`, `timeout`. It is put first on PYTHONPATH, with IPYTHONDIR set to `ipython`.
"""
