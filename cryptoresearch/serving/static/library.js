// Wait for a script that draws. A page of the dashboards loads it itself; elsewhere, as in JupyterLab, the kernel sends it once.
function library(model, name) {
  if (window[name]) return null;
  const tag = document.querySelector("script[data-library]");
  if (tag) return new Promise((done) => tag.addEventListener("load", done));
  window.crLibraries ??= {};
  window.crLibraries[name] ??= new Promise((done) => {
    model.on("msg:custom", (message) => {
      if (!message.library || window[name]) return;
      document.head.append(Object.assign(document.createElement("script"), { textContent: message.library }));
      done();
    });
    model.send({ type: "library" });
  });
  return window.crLibraries[name];
}
