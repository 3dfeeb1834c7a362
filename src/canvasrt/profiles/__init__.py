"""What is known of each GPU, and what follows from it: one YAML file per GPU in this folder."""
