"""The policy network: bridge attention, action heads, residual head. May import `vla.backbones` and what it stands
on."""
