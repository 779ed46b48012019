"""The configuration tree, installed as `mmpretrain.conf`: `pkg://mmpretrain.conf` finds it anywhere."""
