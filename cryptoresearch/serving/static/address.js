// Tell the kernel the query of the page's address, and keep the state of the view there.
function render({ model }) {
  const write = () => {
    const query = model.get("query");
    history.replaceState(null, "", query ? `?${query}` : location.pathname);
  };
  model.on("change:query", write);
  model.send({ search: location.search });
  return () => model.off("change:query", write);
}
export default { render };
