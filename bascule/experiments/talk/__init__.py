"""`vla experiment talk`: does a policy that talks tell the truth, and does it act as before?"""
