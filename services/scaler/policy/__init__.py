"""When the deployment is to grow or shrink, and to which size: decisions about signals, as functions of them."""
