"""Engine bundles, where the build side and the serve side meet: what lies in them, writing one, opening one."""
