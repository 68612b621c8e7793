"""Mixtures of experts as stock classes have them: a dense model, its experts' MLPs and a router."""
