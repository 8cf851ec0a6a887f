import json
def test_a(commands, outcome, tmp_path):
    f=("--evaluation.problems=null",)
    e=commands.sft(tmp_path/"a", *f, processes=2); assert e.codes==[0,0], e.output
    e=commands.sft(tmp_path/"b", *f, processes=2, FAILPOINT="sft/stepped:2")
    e=commands.sft(tmp_path/"b", *f, processes=2); assert e.codes==[0,0], e.output
    a,b=[json.loads((tmp_path/x/"checkpoints/step-000003/optimizer.json").read_text()) for x in "ab"]
    def walk(x,y,p):
        if type(x)!=type(y): print(p,x,y); return
        if isinstance(x,dict):
            for k in x.keys()|y.keys(): walk(x.get(k),y.get(k),p+"/"+str(k))
        elif isinstance(x,list):
            if len(x)!=len(y): print(p,len(x),len(y),x,y)
            for i,(u,v) in enumerate(zip(x,y)): walk(u,v,p+"/"+str(i))
        elif x!=y: print(p,x,y)
    walk(a,b,"")
