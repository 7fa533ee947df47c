"""Keyframe policies that see and answer in the same image space, after BridgeVLA: orthographic views and heat-maps."""
