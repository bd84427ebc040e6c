"""The scaler: owns the layout, brings the deployment to it, and answers operators (the paper's Coordinator brain)."""
