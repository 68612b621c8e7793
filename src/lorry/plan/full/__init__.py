"""Full fine-tuning (`lora=null`): what a plan counts in an adapter's place."""
