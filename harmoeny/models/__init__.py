"""Adapters: one file per family of models, each putting the expert-parallel engine behind its MoE layers."""
