"""Text from the policy that acts."""
