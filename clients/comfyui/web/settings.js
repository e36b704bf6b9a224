import { app } from "../../scripts/app.js";

// ComfyUI shows the last setting first.
app.registerExtension({
  name: "RemoteVAE.Settings",
  settings: [
    {
      id: "RemoteVAE.Token",
      name: "Token",
      category: ["Remote VAE", "Your endpoints", "Token"],
      tooltip: "Token that is sent only to these endpoints. Empty: your Hugging Face login. ComfyUI stores it as plain text; the environment variable REMOTE_VAE_TOKEN is not stored.",
      type: "text",
      attrs: { type: "password", autocomplete: "off" },
      defaultValue: "",
    },
    {
      id: "RemoteVAE.Endpoints",
      name: "Endpoints",
      category: ["Remote VAE", "Your endpoints", "Endpoints"],
      tooltip: "URLs of your own endpoints, separated by spaces. A loader without a URL uses the first.",
      type: "text",
      defaultValue: "",
    },
  ],
});
