"""From a checkpoint and a GPU profile to a bundle of engines: model source, planner, engine definition, builder."""
