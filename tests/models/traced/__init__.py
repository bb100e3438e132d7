"""Tests of traced models."""
