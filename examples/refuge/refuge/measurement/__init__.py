"""What a trained network says about photographs, and what that is worth."""
