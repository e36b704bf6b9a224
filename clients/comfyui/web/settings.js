import { app } from "../../scripts/app.js";

// ComfyUI shows the last one first.
app.registerExtension({
  name: "RemoteVAE.Settings",
  settings: [
    {
      id: "RemoteVAE.Token",
      name: "Token",
      category: ["Remote VAE", "Your endpoints", "Token"],
      tooltip: "Sent to these endpoints alone. Empty: your Hugging Face login. It is stored as it stands; the environment variable REMOTE_VAE_TOKEN is not.",
      type: "text",
      attrs: { type: "password", autocomplete: "off" },
      defaultValue: "",
    },
    {
      id: "RemoteVAE.Endpoints",
      name: "Endpoints",
      category: ["Remote VAE", "Your endpoints", "Endpoints"],
      tooltip: "URLs of your own endpoints, with spaces between them. The first is that of loaders without a URL.",
      type: "text",
      defaultValue: "",
    },
  ],
});
