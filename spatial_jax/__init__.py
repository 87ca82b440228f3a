# SPDX-License-Identifier: Apache-2.0
"""Spatial vision-language models in JAX."""

__version__ = "0.1.0"
