"""Chains: several runs in one YAML file (`stages:`), each in its own folder, later ones from earlier ones."""
