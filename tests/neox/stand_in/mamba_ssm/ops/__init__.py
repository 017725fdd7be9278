"""Where mamba_ssm keeps its scan."""
